"""Do networks from different starts learn the same features?"""
