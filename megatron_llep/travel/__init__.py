"""How tokens travel to their slots: by all-to-all, or by a back end of the flex dispatcher."""
