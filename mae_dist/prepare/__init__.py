"""Turns folders and archives of images into data sets on disk."""
