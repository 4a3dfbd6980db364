"""The server: fixtures that all of its tests share, in conftest.py."""
