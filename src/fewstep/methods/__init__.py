"""Methods: one file per paper, engines that several papers configure in families/."""
