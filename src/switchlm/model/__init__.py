"""The Transformer: routers, experts, attention, and the encoder-decoder made of them."""
