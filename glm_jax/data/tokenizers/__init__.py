"""From text to tokens and back: our own SentencePiece models, and the official ice_text.model."""
