"""What every room may use: errors, arrays, pictures as arrays and as files, writing, the user's cache."""
