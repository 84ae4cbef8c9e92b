"""Encoders composed of four independent choices: mixer, residual, norm and initialisation."""
