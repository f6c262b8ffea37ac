"""The published systems: a folder each, joined by name through the openings that a file of anyone's has.

Each folder is a shelf (:mod:`lotus.shelves`): light to import, with the heavy parts in modules beside it. Nothing else of LOTUS
imports this room.
"""
