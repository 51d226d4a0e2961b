"""What the parts of EQUISeg are worth: small models trained with and without them."""
