"""Read models and weights of others: torchvision's, timm's, and files in any form."""
