/* Crop and flip: rows of a stored image to planes, included once per instruction set. */

/* Rows [y1, y2) of the sample's image after crop and flip. */
TARGET static void ISA(load)(const job *j, const view *v, int64_t y1, int64_t y2)
{
    const sample *s = v->of;
    const int64_t width = j->width, height = j->height, channels = j->channels, pixels = height * width;
    const int64_t step = j->images_last ? channels : 1, next = j->images_last ? 1 : pixels;
    const uint8_t *image = j->images + s->place * pixels * channels;
    for (int64_t c = 0; c < channels; c++) {
        if (step == 1 && !s->top && !s->left && !s->flip) {
            memcpy(v->plane[c] + y1 * width, image + c * next + y1 * width, (size_t)((y2 - y1) * width));
            continue;
        }
        for (int64_t y = y1; y < y2; y++) {
            uint8_t *to = v->plane[c] + y * width;
            const int64_t row = y + s->top;
            if (row < 0 || row >= height) {
                memset(to, j->padding_fill, (size_t)width);
                continue;
            }
            const uint8_t *from = image + c * next + row * width * step;
            if (step != 1) {
                for (int64_t x = 0; x < width; x++)
                    v->apart[x] = from[x * step];
                from = v->apart;
            }
            ISA(shift_row)(from, to, width, s->left, s->flip, j->padding_fill);
        }
    }
}
