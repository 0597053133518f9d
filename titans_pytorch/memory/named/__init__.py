"""Update rules by name: each is a function that gives keywords of NeuralMemory. Start with registry.py."""
