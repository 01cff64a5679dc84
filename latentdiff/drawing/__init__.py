"""What a batch of pictures is drawn with: its texts, where it starts, how it is guided, what is given and kept."""
