"""Small networks to train."""
