"""What a trainer and a server both go by, and neither tells the other."""

WINDOW = 4  # steps of a rank that may be under way at once
GRADIENTS_KEPT = 4  # of each rank: how many steps may be taken before the backward pass of the first is told
