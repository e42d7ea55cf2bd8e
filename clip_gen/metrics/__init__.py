"""How good pictures are: distances between sets of pictures, and scores of single ones, each with an interval."""
