"""Images: found (catalog), written as .beton files (beton), and loaded in the order of a sample plan (loader)."""
