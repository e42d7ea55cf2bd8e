"""The page that script/ui serves."""
