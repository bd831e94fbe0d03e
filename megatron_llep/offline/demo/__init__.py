"""The demos of `make demo` and `make finetune`: what they run, and what they say of it."""
