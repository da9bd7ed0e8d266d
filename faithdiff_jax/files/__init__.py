"""What touches the disk for people: pictures, captions, tokenizers, and output that is written whole or not at all."""
