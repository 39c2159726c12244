"""Build, load and save the transformers of two libraries, timm and transformers."""
