"""The training stages, and what prepares and runs them on any host; trained models ready for use."""
