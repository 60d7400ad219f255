"""Labels of a video's first frame, propagated to all others."""
