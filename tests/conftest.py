"""Puts this folder on the path: few.py is for the tests of every folder."""
