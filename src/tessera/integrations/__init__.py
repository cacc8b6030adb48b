"""Tessera inside other libraries. Each module imports its library itself, when it is imported or first used."""
