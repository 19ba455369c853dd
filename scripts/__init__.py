"""Scripts that are run from a checkout; a package only so that no installed package of this name comes first."""
