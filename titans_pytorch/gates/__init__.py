"""How much a token changes the course of a sequence: pure functions behind `SymplecticGating`."""
