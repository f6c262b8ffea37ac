"""What is wrong with a folder of pictures: doubles, leaks, labels, outliers, damage. numpy and Pillow alone.

Legend: N images, D numbers that describe one, C classes, P pairs, S = 32 pixels, the side at which all is looked at.
"""
