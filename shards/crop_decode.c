/* Decodes a box of a baseline JPEG with libjpeg-turbo, for shards/crop.py, to the bits that decoding all of it gives.

   Tidy files only: one interleaved scan of what every encoder writes, the restart markers that its header announces and
   no others, then EOI, and nothing that libjpeg warns of. Of anything else the answer is None: the caller decodes it
   whole, and what becomes of it is decided there. Rows below the box are never decoded. Where restart markers divide
   each row of MCUs into equal segments, only the segments that cover the box are: they make up a smaller JPEG (splice).

   Terms and letters are those of ITU-T T.81: an MCU is 8 or 16 pixels wide and high, a segment is what lies between
   restart markers. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <setjmp.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

/* From 2.0.3 on 4:4:0 is upsampled as today; 2.0.6 mended jpeg_skip_scanlines. */
#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000006
#error "libjpeg-turbo 2.0.6 or later is needed"
#endif

typedef unsigned char byte;

enum { RST0 = 0xD0, SOI = 0xD8, EOI = 0xD9, SOS = 0xDA, DRI = 0xDD, SOF0 = 0xC0, SOF1 = 0xC1, DHT = 0xC4, DQT = 0xDB,
       DAC = 0xCC, APP0 = 0xE0, APP15 = 0xEF, COM = 0xFE };

/* libjpeg's quick Huffman decoder wants so many bytes ahead of it: 512 for each of up to 6 blocks of an MCU. */
#define LOOKAHEAD 3072

typedef struct {
  size_t height, width, mcu_height, mcu_width; /* pixels */
  size_t num_components;
  size_t interval;                  /* MCUs between restart markers; 0 for none */
  size_t size_at, interval_at, scan_at; /* offsets: of the height in SOF, of DRI's parameter, of the scan's data */
} Frame;

typedef struct {
  size_t top, left, bottom, right; /* pixels; bottom and right are outside */
} Box;

static size_t uint16(const byte *at) { return (size_t)at[0] << 8 | at[1]; }

static size_t divide_up(size_t number, size_t divisor) { return (number + divisor - 1) / divisor; }

/* ---- The header */

static int read_sof(const byte *parameters, size_t size, Frame *frame) {
  if (frame->size_at || size < 6 || parameters[0] != 8) return 0;
  frame->height = uint16(parameters + 1), frame->width = uint16(parameters + 3);
  frame->num_components = parameters[5];
  if (!frame->height || !frame->width || size != 6 + 3 * frame->num_components) return 0;
  size_t across = parameters[7] >> 4, down = parameters[7] & 15;
  frame->mcu_height = 8 * down, frame->mcu_width = 8 * across;
  if (frame->num_components == 1) return across == 1 && down == 1;
  return frame->num_components == 3 && 1 <= across && across <= 2 && 1 <= down && down <= 2 &&
         parameters[10] == 0x11 && parameters[13] == 0x11;
}

/* The frame of a file whose segments follow each other without a byte between, up to its first scan. */
static int read_frame(const byte *data, size_t size, Frame *frame) {
  memset(frame, 0, sizeof *frame);
  if (size < 4 || data[0] != 0xFF || data[1] != SOI) return 0;
  for (size_t at = 2; size - at >= 4;) {
    byte marker = data[at + 1];
    size_t length = uint16(data + at + 2);
    const byte *parameters = data + at + 4;
    if (data[at] != 0xFF || length < 2 || length > size - at - 2) return 0;
    if (marker == SOF0 || marker == SOF1) {
      if (!read_sof(parameters, length - 2, frame)) return 0;
      frame->size_at = at + 5;
    } else if (marker == DRI && length == 4) {
      frame->interval = uint16(parameters), frame->interval_at = at + 4;
    } else if (marker == SOS) {
      frame->scan_at = at + 2 + length;
      return frame->size_at && length > 2 && parameters[0] == frame->num_components;
    } else if (marker != DHT && marker != DQT && marker != COM && (marker < APP0 || marker > APP15)) {
      return 0;
    }
    at += 2 + length;
  }
  return 0;
}

/* ---- Restart segments */

/* Whether the scan has the markers it should, and EOI behind them. `starts`, of a count known from the frame, gets the
   offset of each segment, or is NULL. */
static int check_scan(const byte *data, size_t size, const Frame *frame, size_t num_segments, size_t *starts) {
  const byte *at = data + frame->scan_at, *last = data + size - 1;
  if (starts) starts[0] = frame->scan_at;
  for (size_t number = 1; at < last && (at = memchr(at, 0xFF, (size_t)(last - at))); at += 2) {
    if (at[1] == 0) continue;
    if (number == num_segments) return at[1] == EOI;
    if (at[1] != RST0 + (number - 1) % 8) return 0;
    if (starts) starts[number] = (size_t)(at + 2 - data);
    number++;
  }
  return 0;
}

/* Segments by rows and columns of the image: those from `first` that cover a box, and how many pixels one has. */
typedef struct {
  size_t per_row, height, width;
  size_t first_row, end_row, first_column, end_column;
} Segments;

static Segments segments_of(const Frame *frame, const Box *box) {
  Segments s = {.height = frame->mcu_height, .width = frame->interval * frame->mcu_width};
  s.per_row = divide_up(frame->width, s.width);
  s.first_row = box->top / s.height, s.end_row = divide_up(box->bottom, s.height);
  s.first_column = box->left / s.width, s.end_column = divide_up(box->right, s.width);
  return s;
}

static void write_uint16(byte *at, size_t number) { at[0] = (byte)(number >> 8), at[1] = (byte)number; }

static size_t least(size_t one, size_t other) { return one < other ? one : other; }

/* The segments that cover the box as a JPEG of its own, with LOOKAHEAD zeros behind it; `frame` and `box` become those
   in it. NULL without memory. */
static byte *splice(const byte *data, const size_t *starts, Frame *frame, Box *box, size_t *size) {
  Segments s = segments_of(frame, box);
  size_t bytes = frame->scan_at, columns = s.end_column - s.first_column;
  for (size_t row = s.first_row; row < s.end_row; row++) {
    const size_t *start = starts + row * s.per_row;
    bytes += start[s.end_column] - start[s.first_column];
  }
  byte *spliced = malloc(bytes + LOOKAHEAD), *at = spliced + frame->scan_at;
  if (!spliced) return NULL;
  memcpy(spliced, data, frame->scan_at);
  size_t number = 0;
  for (size_t row = s.first_row; row < s.end_row; row++) {
    const size_t *start = starts + row * s.per_row + s.first_column;
    memcpy(at, data + start[0], start[columns] - start[0]);
    for (size_t column = 1; column <= columns; column++) at[start[column] - start[0] - 1] = (byte)(RST0 + number++ % 8);
    at += start[columns] - start[0];
  }
  at[-1] = EOI; /* in the place of the last restart marker */
  memset(at, 0, LOOKAHEAD);
  *size = bytes + LOOKAHEAD;

  size_t top = s.first_row * s.height, left = s.first_column * s.width;
  frame->height = least(frame->height, s.end_row * s.height) - top;
  frame->width = least(frame->width, s.end_column * s.width) - left;
  write_uint16(spliced + frame->size_at, frame->height);
  write_uint16(spliced + frame->size_at + 2, frame->width);
  *box = (Box){box->top - top, box->left - left, box->bottom - top, box->right - left};
  return spliced;
}
