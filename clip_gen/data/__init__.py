"""Reads pictures from untrusted archives and folders, and decodes all common formats to sRGB."""
