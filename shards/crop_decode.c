/* Decodes a box of a baseline JPEG with libjpeg-turbo, for shards/crop.py, to the bits that decoding all of it gives.

   Tidy files only: one interleaved scan in a usual sampling, the restart markers that the header announces and no
   others, EOI right behind, and nothing that libjpeg warns of. For anything else the answer is None: the caller decodes
   it whole, and that decides what becomes of it. Rows below the box are never decoded. Where restart markers cut each
   row of MCUs into equal segments, only those that cover the box are: `splice` makes a smaller JPEG of them.

   The terms are those of ITU-T T.81. An MCU is 8 or 16 pixels wide and high; a segment is what lies between two restart
   markers. Sizes and positions are in pixels. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

/* 2.0.3 upsamples 4:4:0 as later versions do, and 2.0.6 mended jpeg_skip_scanlines. */
#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000006
#error "libjpeg-turbo 2.0.6 or later is needed"
#endif

typedef unsigned char byte;

enum { SOF0 = 0xC0, SOF1 = 0xC1, DHT = 0xC4, RST0 = 0xD0, SOI = 0xD8, EOI = 0xD9, SOS = 0xDA, DQT = 0xDB, DRI = 0xDD };
enum { APP0 = 0xE0, APP15 = 0xEF, COM = 0xFE };

#define MIN_COLUMNS 8 /* libjpeg does not interpolate the chroma of rows of less than 5 pixels */

typedef struct {
  size_t height, width, mcu_height, mcu_width;
  size_t num_components, interval; /* interval: MCUs in a segment, 0 without restart markers */
  size_t size_at, scan_at;         /* offsets of the height in SOF, and of the data of the scan */
} Frame;

typedef struct {
  size_t top, left, bottom, right; /* bottom and right are outside */
} Box;

static size_t least(size_t one, size_t other) { return one < other ? one : other; }

static size_t most(size_t one, size_t other) { return one > other ? one : other; }

static size_t divided_up(size_t number, size_t divisor) { return (number + divisor - 1) / divisor; }

static size_t uint16_at(const byte *at) { return (size_t)at[0] << 8 | at[1]; }

static void put_uint16(byte *at, size_t number) {
  at[0] = (byte)(number >> 8);
  at[1] = (byte)number;
}

/* ---- The header */

static int read_sof(const byte *parameters, size_t length, Frame *frame) {
  if (length < 9 || parameters[0] != 8) return 0;
  size_t across = parameters[7] >> 4, down = parameters[7] & 15;
  frame->height = uint16_at(parameters + 1);
  frame->width = uint16_at(parameters + 3);
  frame->num_components = parameters[5];
  frame->mcu_height = 8 * down;
  frame->mcu_width = 8 * across;
  if (!frame->height || !frame->width || length != 6 + 3 * frame->num_components) return 0;
  if (frame->num_components == 1) return across == 1 && down == 1;
  return frame->num_components == 3 && (across == 1 || across == 2) && (down == 1 || down == 2) &&
         parameters[10] == 0x11 && parameters[13] == 0x11;
}

/* The frame of a file up to its only scan, if its segments follow one another without a byte between. */
static int read_frame(const byte *data, size_t size, Frame *frame) {
  memset(frame, 0, sizeof *frame);
  if (size < 4 || data[0] != 0xFF || data[1] != SOI) return 0;
  for (size_t at = 2; size - at >= 4;) {
    byte marker = data[at + 1];
    size_t length = uint16_at(data + at + 2);
    if (data[at] != 0xFF || length < 2 || length > size - at - 2) return 0;
    const byte *parameters = data + at + 4;
    if (marker == SOF0 || marker == SOF1) {
      if (!read_sof(parameters, length - 2, frame)) return 0;
      frame->size_at = at + 5;
    } else if (marker == DRI && length == 4) {
      frame->interval = uint16_at(parameters);
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

static size_t count_segments(const Frame *frame) {
  size_t rows = divided_up(frame->height, frame->mcu_height), columns = divided_up(frame->width, frame->mcu_width);
  return frame->interval ? divided_up(rows * columns, frame->interval) : 1;
}

/* Where each segment begins, and, last, what follows EOI; NULL where the scan has other markers than it should, or
   without memory. */
static size_t *find_segments(const byte *data, size_t size, const Frame *frame) {
  size_t num_segments = count_segments(frame), number = 0;
  if (num_segments > size / 2) return NULL; /* a header can claim what it likes */
  size_t *starts = malloc((num_segments + 1) * sizeof *starts);
  if (!starts) return NULL;
  starts[0] = frame->scan_at;
  const byte *at = data + frame->scan_at, *last = data + size - 1;
  for (; at < last && (at = memchr(at, 0xFF, (size_t)(last - at))); at += 2) {
    if (at[1] == 0) continue;
    if (at[1] != (number + 1 == num_segments ? EOI : RST0 + number % 8)) break;
    starts[++number] = (size_t)(at + 2 - data);
    if (number == num_segments) return starts;
  }
  free(starts);
  return NULL;
}

static Box moved(Box box, size_t top, size_t left) {
  return (Box){box.top - top, box.left - left, box.bottom - top, box.right - left};
}

/* The segments that cover `reach` as a JPEG of its own, in which `frame` and the boxes are from then on. To be freed;
   NULL where there is nothing to leave out above or beside the box, and without memory. */
static byte *splice(const byte *data, const size_t *starts, Frame *frame, Box *box, Box *reach, size_t *size) {
  size_t mcus_per_row = divided_up(frame->width, frame->mcu_width);
  if (!frame->interval || mcus_per_row % frame->interval) return NULL;
  size_t height = frame->mcu_height, width = frame->interval * frame->mcu_width; /* of a segment */
  size_t per_row = mcus_per_row / frame->interval;
  size_t first_row = reach->top / height, end_row = divided_up(reach->bottom, height);
  size_t first_column = reach->left / width, columns = divided_up(reach->right, width) - first_column;
  if (first_row == 0 && columns == per_row) return NULL;

  size_t length = frame->scan_at;
  for (size_t row = first_row; row < end_row; row++) {
    const size_t *start = starts + row * per_row + first_column;
    length += start[columns] - start[0];
  }
  byte *spliced = malloc(length);
  if (!spliced) return NULL;

  memcpy(spliced, data, frame->scan_at);
  byte *at = spliced + frame->scan_at;
  for (size_t row = first_row, number = 0; row < end_row; row++) {
    const size_t *start = starts + row * per_row + first_column;
    memcpy(at, data + start[0], start[columns] - start[0]);
    for (size_t column = 1; column <= columns; column++, number++)
      at[start[column] - start[0] - 1] = (byte)(RST0 + number % 8);
    at += start[columns] - start[0];
  }
  at[-1] = EOI; /* in the place of the last restart marker */
  *size = length;

  size_t top = first_row * height, left = first_column * width;
  frame->height = least(frame->height, end_row * height) - top;
  frame->width = least(frame->width, (first_column + columns) * width) - left;
  put_uint16(spliced + frame->size_at, frame->height);
  put_uint16(spliced + frame->size_at + 2, frame->width);
  *box = moved(*box, top, left);
  *reach = moved(*reach, top, left);
  return spliced;
}

/* ---- Pixels */

/* The box and what its pixels depend on: where chroma is subsampled, it is interpolated from its neighbours. It begins
   with an MCU, as jpeg_crop_scanline would have it. */
static Box reach_of(const Frame *frame, const Box *box) {
  size_t across = frame->mcu_width > 8, down = frame->mcu_height > 8;
  Box reach;
  reach.top = box->top - least(down, box->top);
  reach.bottom = least(frame->height, box->bottom + down);
  reach.right = least(frame->width, most(box->right + across, MIN_COLUMNS));
  reach.left = least(box->left - least(across, box->left), reach.right - least(MIN_COLUMNS, reach.right));
  reach.left -= reach.left % frame->mcu_width;
  return reach;
}

typedef struct {
  struct jpeg_error_mgr manager;
  jmp_buf stop;
} Errors;

static void stop(j_common_ptr jpeg) { longjmp(((Errors *)jpeg->err)->stop, 1); }

static void stop_at_warnings(j_common_ptr jpeg, int level) {
  if (level < 0) stop(jpeg);
}

/* Whether libjpeg reads in the header what read_frame did; then it is set up to decode the columns of `reach`. */
static int start(struct jpeg_decompress_struct *jpeg, const Frame *frame, const Box *reach) {
  jpeg_read_header(jpeg, TRUE);
  if (jpeg->image_height != frame->height || jpeg->image_width != frame->width) return 0;
  jpeg->out_color_space = JCS_RGB;
  jpeg_start_decompress(jpeg);
  JDIMENSION left = (JDIMENSION)reach->left, width = (JDIMENSION)(reach->right - reach->left);
  jpeg_crop_scanline(jpeg, &left, &width);
  return left == reach->left && width == reach->right - reach->left && jpeg->output_width == width &&
         jpeg->output_components == 3;
}

/* The box as RGB into `out`, uint8 [height, width, 3]. */
static void read_rows(struct jpeg_decompress_struct *jpeg, const Box *box, size_t indent, byte *out) {
  size_t length = 3 * (box->right - box->left);
  JSAMPARRAY rows = jpeg->mem->alloc_sarray((j_common_ptr)jpeg, JPOOL_IMAGE, 3 * jpeg->output_width, 2);
  if (box->top) jpeg_skip_scanlines(jpeg, (JDIMENSION)box->top);
  for (size_t row = box->top; row < box->bottom;) {
    JDIMENSION num_read = jpeg_read_scanlines(jpeg, rows, (JDIMENSION)least(2, box->bottom - row));
    for (JDIMENSION i = 0; i < num_read; i++, row++, out += length) memcpy(out, rows[i] + 3 * indent, length);
  }
}

/* Whether the box got decoded without a word from libjpeg. */
static int decode_rows(const byte *data, size_t size, const Frame *frame, const Box *box, const Box *reach, byte *out) {
  struct jpeg_decompress_struct jpeg;
  Errors errors;
  jpeg.err = jpeg_std_error(&errors.manager);
  errors.manager.error_exit = stop;
  errors.manager.emit_message = stop_at_warnings;
  if (setjmp(errors.stop)) {
    jpeg_destroy_decompress(&jpeg);
    return 0;
  }
  jpeg_create_decompress(&jpeg);
  jpeg_mem_src(&jpeg, data, size);
  int started = start(&jpeg, frame, reach);
  if (started) read_rows(&jpeg, box, box->left - reach->left, out);
  jpeg_destroy_decompress(&jpeg);
  return started;
}

static int decode_box(const byte *data, size_t size, Frame frame, Box box, byte *out) {
  size_t *starts = find_segments(data, size, &frame);
  if (!starts) return 0;
  Box reach = reach_of(&frame, &box);
  byte *spliced = splice(data, starts, &frame, &box, &reach, &size);
  free(starts);
  int done = decode_rows(spliced ? spliced : data, size, &frame, &box, &reach, out);
  free(spliced);
  return done;
}

/* ---- The module */

static PyObject *read_size(PyObject *Py_UNUSED(module), PyObject *object) {
  Py_buffer data;
  Frame frame;
  if (PyObject_GetBuffer(object, &data, PyBUF_SIMPLE)) return NULL;
  int tidy = read_frame(data.buf, (size_t)data.len, &frame);
  PyBuffer_Release(&data);
  if (!tidy) Py_RETURN_NONE;
  return Py_BuildValue("nn", (Py_ssize_t)frame.height, (Py_ssize_t)frame.width);
}

static int inside(Py_ssize_t start, Py_ssize_t length, size_t whole) {
  return start >= 0 && length > 0 && (size_t)length <= whole && (size_t)start <= whole - (size_t)length;
}

static PyObject *decode(PyObject *Py_UNUSED(module), PyObject *arguments) {
  Py_buffer data;
  Py_ssize_t top, left, height, width;
  Frame frame;
  PyObject *pixels = NULL;
  if (!PyArg_ParseTuple(arguments, "y*nnnn", &data, &top, &left, &height, &width)) return NULL;
  int done = read_frame(data.buf, (size_t)data.len, &frame);
  if (done && !(inside(top, height, frame.height) && inside(left, width, frame.width))) {
    PyErr_SetString(PyExc_ValueError, "the box lies outside the image");
    done = 0;
  } else if (done) {
    pixels = PyByteArray_FromStringAndSize(NULL, 3 * height * width);
  }
  if (pixels) {
    Box box = {(size_t)top, (size_t)left, (size_t)(top + height), (size_t)(left + width)};
    byte *out = (byte *)PyByteArray_AS_STRING(pixels);
    Py_BEGIN_ALLOW_THREADS
    done = decode_box(data.buf, (size_t)data.len, frame, box, out);
    Py_END_ALLOW_THREADS
    if (!done) Py_CLEAR(pixels);
  }
  PyBuffer_Release(&data);
  if (pixels || PyErr_Occurred()) return pixels;
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"read_size", read_size, METH_O, "read_size(data) -> (height, width) of a JPEG that `decode` may decode, or None."},
    {"decode", decode, METH_VARARGS,
     "decode(data, top, left, height, width) -> bytearray, RGB [height, width, 3], or None."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_crop_decode", .m_doc = "Boxes of JPEGs.", .m_methods = methods};

PyMODINIT_FUNC PyInit__crop_decode(void) { return PyModule_Create(&definition); }
