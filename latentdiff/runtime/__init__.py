"""What makes the same networks fast."""
