"""What a request asks for and what it gets back: parameters, outputs, refusals."""
