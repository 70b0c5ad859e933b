"""Models and weights that others made: torchvision's, timm's, and files in any form."""
