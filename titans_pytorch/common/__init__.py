"""Shared by all packages: checks of arguments, atomic files."""
