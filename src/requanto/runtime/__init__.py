"""State of the process: settings, scratch buffers, and checks for tracing."""
