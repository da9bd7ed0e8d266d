"""How good restored pictures are: measures against a reference, and pictures to look at."""
