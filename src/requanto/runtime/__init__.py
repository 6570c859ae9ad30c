"""What holds for the whole process: settings, scratch buffers, and whether something traces."""
