"""What a GPU or many of them could do, on paper: ``python -m bench estimates``."""
