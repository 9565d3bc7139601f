"""What crosses a wire, and what the pure core reasons on."""
