"""What a plan costs: bytes on the links, seconds of a layer. Integers and numpy only, no torch."""
