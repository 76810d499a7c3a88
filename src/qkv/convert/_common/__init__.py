"""What conversions share: recorded activations, structural checks."""
