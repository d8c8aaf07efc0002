"""The parts on pretrained models: ``python -m bench papers real``."""
