"""Folders of pictures with paired maps, joint transforms, ordered sampling, the built-in scenes."""
