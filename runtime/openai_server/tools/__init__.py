"""Tool calls: how families of models write them, the grammar that forces one, and the parser that finds them."""
