"""What is on a disk or a screen: files whole or not at all, locks, pictures, models proved complete, text as text."""
