"""Text to tokens and back: our SentencePiece models and the official ice_text.model."""
