"""How a memory is written and read. Every engine gives the same numbers; they differ in what they build."""
