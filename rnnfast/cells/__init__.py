"""The cells, by name. A new cell is a file here and a line in CELLS."""

from . import gru, lstm, rnn

CELLS = {cell.name: cell for cell in (*rnn.CELLS, *lstm.CELLS, *gru.CELLS)}
