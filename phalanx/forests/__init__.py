"""Decision trees and forests of them: growing, as tables of numbers, and predicting."""
