/* Facts about Python's objects, asked of hundreds at once (robust_dist/optim/addresses.py).
 *
 * Every function that is called here belongs to a stable interface, Python's or torch's, and is handed over: no header
 * of theirs is needed. The caller holds the interpreter's lock.
 */
#include <stdint.h>

typedef struct {
    void *(*item)(void *list, intptr_t index);                                   /* PyList_GetItem */
    int (*next)(void *dict, intptr_t *position, void **key, void **value);       /* PyDict_Next */
    int32_t (*data)(void *tensor, void **data);                                  /* aoti_torch_get_data_ptr */
    int64_t place; /* of torch's tensor within its Python object, bytes */
} interfaces;

/* Write where the first `count` tensors of a list lie; returns how many have an address. */
int64_t robust_dist_addresses(const interfaces *by, void *list, int64_t count, int64_t *found)
{
    for (int64_t i = 0; i < count; i++) {
        void *data;
        if (by->data((char *)by->item(list, i) + by->place, &data))
            return i;
        found[i] = (int64_t)(intptr_t)data;
    }
    return count;
}

/* Whether `count` dicts of a list have these items, `width` each: keys and values in turn, in their order. */
int robust_dist_hold(const interfaces *by, void *list, int64_t count, const int64_t *items, int64_t width)
{
    for (int64_t i = 0; i < count; i++) {
        void *dict = by->item(list, i), *key, *value;
        intptr_t position = 0;
        for (int64_t left = width; left > 0; left--, items += 2)
            if (!by->next(dict, &position, &key, &value) || (intptr_t)key != items[0] || (intptr_t)value != items[1])
                return 0;
        if (by->next(dict, &position, &key, &value))
            return 0;
    }
    return 1;
}
