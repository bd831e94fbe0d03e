"""Two training runs side by side: what they logged, whether they differ, who is there sooner."""
