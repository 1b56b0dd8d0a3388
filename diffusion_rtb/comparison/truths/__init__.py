"""What samplers are held against."""
