"""A neural memory's parts: what NeuralMemory (neural_memory.py) is built from."""
